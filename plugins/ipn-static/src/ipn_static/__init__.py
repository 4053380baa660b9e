"""The `static` strategy: visual tokens that no question changes."""
