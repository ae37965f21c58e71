"""What is different between two releases of a package, and what that means for the app that uses them."""
