"""The Mamba-2 mixer, the hybrid model around it, and the small VLM to try it on."""
