"""What ships for newcomers and tests: small models and the scripts that make them."""
