"""The fault campaign: faults put into tiny runs, which must end as a run without them. See docs/reliability.md.

    make campaign                               every campaign, under half an hour on two cores
    make campaign CAMPAIGN_SEED=7               other moments, files and values
    make campaign CAMPAIGN_SCALE=3 ARGS="-k kills"

`process` starts a run as a process, forked from one that has imported everything; `faults` is what happens in it;
`programs` are the runs, and how a continued one is compared with an uninterrupted one; `tally` counts. The other
modules are a campaign each: `tests/campaign/test_campaign.py` lists them.
"""
