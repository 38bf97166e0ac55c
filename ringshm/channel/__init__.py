"""What a user holds: handles, loans, borrows, and how their calls wait."""
