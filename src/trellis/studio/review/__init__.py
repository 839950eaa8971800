"""Look back on a session and take its result away: journal, comparison, blind test, exports, retraining."""
