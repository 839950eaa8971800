"""What the product does. No HTTP, no SQL, no torch."""
