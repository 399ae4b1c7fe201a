"""Methods that compute part of an attention or of an MLP: one file each."""
