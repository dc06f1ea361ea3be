"""Other libraries with keymap put in; each has a module of its name, which is not imported by keymap itself."""
