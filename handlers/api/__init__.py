"""What clients send and get: options, pictures, and forms of answers."""
