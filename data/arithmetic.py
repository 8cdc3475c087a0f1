"""The embedded task: sums of five digits, worked out left to right modulo 10, with good and bad explanations."""

TEACHER_SYSTEM_SHORT = "Explain the solution."
STUDENT_SYSTEM_SHORT = "Think, then solve."
