"""Checks of a written checkpoint, run as a script where nothing of surgery can be imported.

`python surgery/probe JOB.json RESULT.json`: JOB names the folder and what was promised, RESULT receives every check.
Only the standard library, torch and transformers are imported, so the same script runs on any transformers.
"""
