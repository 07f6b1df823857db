"""diffusers' checkpoints and live objects, without importing diffusers."""
