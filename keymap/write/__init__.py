"""Write tensors to files: streamed, and put in place only when whole."""
