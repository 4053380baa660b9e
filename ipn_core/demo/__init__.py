"""`ipn demo`: a web page on which one model is asked about pictures, and shows where it looked."""
