"""Small budgets: `Efficient` and what only it uses, for a small model that is trained from scratch."""
