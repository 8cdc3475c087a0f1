"""Collection of traces: what a teacher writes for students, ranked by the reward."""
