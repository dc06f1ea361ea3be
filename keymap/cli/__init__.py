"""The command line, `keymap`. Nothing here imports torch before a command needs it."""
