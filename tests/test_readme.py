"""README says what the code has."""

from experiments.methods_table import main


def test_the_table_of_methods_is_up_to_date() -> None:
    main(["--check"])
