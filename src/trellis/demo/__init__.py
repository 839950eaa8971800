"""The demo model: what it was taught, how it is made, and how its voices are told apart."""
