"""Boxes around a car from six cameras, by day, by night, and when something appears suddenly."""

from kits.bev_perception.kit import BevPerception

KIT = BevPerception()
