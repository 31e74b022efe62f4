"""How a consistent copy is made: arming, walk, fault threads, events, re-checks, dirty logging."""
