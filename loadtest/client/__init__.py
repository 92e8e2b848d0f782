"""What runs under locust: who sends what and when, what is right, and what is written down."""
