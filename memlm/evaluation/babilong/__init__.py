"""What BABILong is made of: its prompts and labels, and stories in the manner of bAbI."""
