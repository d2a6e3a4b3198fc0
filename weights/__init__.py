"""The official weights: getting them, loading them, drawing a picture with them."""
