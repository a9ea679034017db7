"""What is a trainer given?  Models and tokenizers so small that every number is known, as checkpoint folders."""
