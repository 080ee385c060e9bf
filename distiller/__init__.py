"""The ground floor: the records that flow, the teacher engines, the resumable stage runner and the CLI base.

Read in this order: `records`, `engine`, `templates`, `manifest`, `store`, `runner`, `arguments`, `cli`.
"""
