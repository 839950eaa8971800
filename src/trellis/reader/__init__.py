"""The process that reads files of prompts, which anyone may have written: one request, then it ends."""
