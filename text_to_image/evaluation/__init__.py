"""Are generated pictures copies of the training pictures, and how varied are they?"""
