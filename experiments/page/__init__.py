"""What every report consists of: charts, their data, and the page around them."""
