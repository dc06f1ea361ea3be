"""From names, shapes and dtypes to a plan: which piece of which tensor goes where. Reads no weights."""
