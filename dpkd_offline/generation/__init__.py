"""Stage one: responses of teacher and student, and the teacher's log-probs of both, committed shard by shard.

The only folder that lets a teacher answer or score for a dataset. What was made in an earlier round is reused here.
"""
