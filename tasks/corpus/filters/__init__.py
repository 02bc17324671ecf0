"""Quality rules, one small file each with its source named.

A rule measures a document (a number, or None where the rule does not apply) and names the config
fields its bounds stand in. Measures are written beside the documents, bounds are applied last.
"""
