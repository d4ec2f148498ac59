"""What people are told of a workspace, and who has been told what: facts in, messages out. Nothing is sent here."""
