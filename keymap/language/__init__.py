"""Rules as data and at work: patterns, views and rules of the YAML files, compiled. Knows no file and no model."""
