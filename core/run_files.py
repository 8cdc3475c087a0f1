"""Names of what lies in a run's folder, for those who write it and those who only read it."""

CONFIG_FILE = "config.yaml"
