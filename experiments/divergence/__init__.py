"""The study: does a change heal or grow on its way to the last layer?"""
