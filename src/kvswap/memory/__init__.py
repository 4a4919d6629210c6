"""The memory limit: what needs how much, the ledger, the slots for groups, what the machine has free."""
