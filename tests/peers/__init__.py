"""Small real models of every peer library, with every weight randomised."""
