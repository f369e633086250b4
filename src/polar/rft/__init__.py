"""The reward in reinforcement fine-tuning: reward functions for other frameworks, and data for them."""
