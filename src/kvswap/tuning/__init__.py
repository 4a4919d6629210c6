"""What a machine costs and which settings fit it: profile, cost model, tables, search, doctor."""
