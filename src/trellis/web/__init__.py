"""HTTP only: parse, call the studio, render."""
