"""What runs inside an executor's Python or inside SQL. Pure Arrow/numpy functions; the UDF around one is two lines."""
