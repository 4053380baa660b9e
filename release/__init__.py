"""What has to hold before a release: hashed requirements, an audit of them, wheels that work."""
