"""The command line. app.py registers the commands; each noun's module parses, calls one operation and prints.

output.py renders, errors.py turns errors into exit codes, streams.py keeps the standard streams from raising.
"""
