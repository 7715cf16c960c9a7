"""The student as users load it: a stock folder, a single file, a card."""
