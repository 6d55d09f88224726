"""The fastest settings of a recipe that fit a card: what chunks take is simulated once a way to train, and put together for all others."""
