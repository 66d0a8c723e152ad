"""A migration in a notebook: driven live in the Console, taken apart in the Explorer."""
