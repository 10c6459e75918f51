"""A worker of NVIDIA Dynamo around one engine: `dsv4c dynamo ARTIFACT --role both | prefill | decode`.

    frontend --token ids--> engine.DynamoEngine.generate --Request--> EngineLoop --Event--> chunks --> frontend

asked.py reads a request, chunks.py writes what comes back, version.py says which Dynamo this was tested with; none of
these imports Dynamo. engine.py and worker.py do, and are imported where Dynamo is installed.
"""
