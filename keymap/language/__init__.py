"""The rule language: patterns, views and rules, compiled and applied. It knows neither files nor models."""
