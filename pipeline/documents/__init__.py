"""What a package says of itself, for people and for machines."""
