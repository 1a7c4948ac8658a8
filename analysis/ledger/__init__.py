"""The ledger of the papers' claims: what is claimed, what tests it, the verdict, and the page that tells it."""
