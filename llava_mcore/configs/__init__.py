"""YAML groups that Hydra composes. A package only so that an installed one carries them."""
