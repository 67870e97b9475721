"""Typed settings: ``schema`` says what may be set, ``compose`` builds it from YAML groups and ``key=value`` overrides."""
