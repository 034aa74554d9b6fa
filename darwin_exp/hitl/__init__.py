"""People in the loop: agents ask, people answer and steer, and nothing happens unapproved.

`inbox` is the store that any process may write, `requests` the rules that say what its entries
amount to, `policy` what is asked at all, `paths` where approved files may go, `notify` what tells
people that something waits. `terminal` and `web` are two doors to the same inbox.
"""
